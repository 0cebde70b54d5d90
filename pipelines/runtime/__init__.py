"""A stage as a child process: its key, its folder, how it is started, monitored and stopped, on one
host or several.
"""
