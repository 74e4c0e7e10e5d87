"""cream_kernels inside other libraries, a module each: nothing here is imported unless asked for by name.

trl    log-probs of DPOTrainer by linear_logp, and a DPOTrainer whose loss is weighted by consistency
"""
