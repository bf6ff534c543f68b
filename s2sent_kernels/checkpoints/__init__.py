"""What is stored in folders: files and dicts in, files and dicts out. Nothing here knows a module class of this package."""
