"""The compiled engine. ``limits`` loads the extension and tells what it refuses; ``engine`` computes."""
