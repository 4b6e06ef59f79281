"""Machine unlearning that survives 4-bit quantization: losses and a trainer, audits, and evaluation as deployed.

Import from the modules: ``quail.trainer``, ``quail.losses``, ``quail.audit``, ``quail.evaluate``. This one imports
nothing, so that the command line can set the threads' waiting policy before torch reads it.
"""
