"""Subcommands of ``s2sent``, one a module: ``add`` describes its arguments to argparse, ``run`` does the work."""
