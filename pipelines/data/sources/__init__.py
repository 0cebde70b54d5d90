"""From a file, folder, address or data set to its rows as written."""
