"""More than half of the interpreter's time is its own upkeep. This leaves the upkeep out, and no number changes.

These are names that Triton keeps to itself: where a release has none of them, its tests are slower.
"""

import dataclasses
import inspect

import triton.language as tl
from triton.runtime import interpreter


def install():
    _patch_each_module_once()
    # Every sum and product of indices is computed again in 64 bits and compared: no tensor of these tests is large enough.
    # test_large.py has some that are, on a GPU.
    options = interpreter.interpreter_builder.options
    if hasattr(options, "sanitize_overflow"):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_each_module_once():
    """A kernel's launch replaces the functions of ``tl``, and so does every call of a helper within it, which finds them
    replaced."""
    if not hasattr(interpreter, "_LangPatchScope") or not hasattr(interpreter, "_patch_lang"):
        return
    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope
    patched = set()

    def patch_once(function):
        modules = [
            value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)
        ]
        if patched.issuperset(modules):
            return scope()
        patched.update(modules)
        return patch(function)

    def restore(self, restore=scope.restore):
        patched.clear()
        restore(self)

    interpreter._patch_lang, scope.restore = patch_once, restore
