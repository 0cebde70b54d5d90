"""A stage as a child process: started, monitored and stopped, on one host or several."""
