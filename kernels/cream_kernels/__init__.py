"""Operators for consistency-weighted preference training (CREAM, arXiv 2410.12735), as functions of tensors.

    linear_logp          log-probs of tokens from hidden states and LM head, without the (N, V) logits
    gather_logp          the same from logits that exist
    weighted_dpo         the DPO loss weighted by consistency, from margins
    linear_weighted_dpo  the same from hidden states, with its gradients in one pass
    kendall_tau          rank correlation of two rewardings, one coefficient a prompt
    top_p_sample         one token a row of logits by temperature and top-p, from given uniform numbers
    IGNORE               the target of a row that counts for nothing

reference.py says what each of them means. Needs torch; numba and triton are imported where they are used, if there.
"""

from .gather_logp import gather_logp
from .kendall import kendall_tau
from .linear_logp import linear_logp
from .linear_weighted_dpo import linear_weighted_dpo
from .reference import IGNORE
from .top_p import top_p_sample
from .weighted_dpo import weighted_dpo

__all__ = [
    "IGNORE",
    "gather_logp",
    "kendall_tau",
    "linear_logp",
    "linear_weighted_dpo",
    "top_p_sample",
    "weighted_dpo",
]
