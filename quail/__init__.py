"""Machine unlearning that survives 4-bit quantization: losses and a trainer, audits, and evaluation as deployed.

Import from the modules: ``quail.trainer``, ``quail.losses``, ``quail.auditing``, ``quail.evaluate``.
``quail.audit`` and ``quail.AuditReport`` are found at their first use: this module itself imports nothing, so that
the command line can set the threads' waiting policy before torch reads it.
"""


def __getattr__(name: str):
    if name in ("audit", "AuditReport"):
        from . import auditing

        return getattr(auditing, name)
    raise AttributeError(f"module 'quail' has no attribute {name!r}")
