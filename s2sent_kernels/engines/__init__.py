"""Who computes: ``plain`` (backend "reference"), ``triton`` and ``native``, behind one interface; ``choice`` picks one."""
