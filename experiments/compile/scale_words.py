"""The text of docs/scale.md around its tables (scale_page.py)."""

HEAD = """# mHC at the paper's sizes: predicted cost over the plain residual model

Written by `mhc overhead` from the reports in `docs/compile/`, each of them what `mhc compile --json` prints:
the real train step (forward, backward, AdamW), compiled by the TPU's own compiler for a described slice.
**Nothing here was measured on a TPU.** Memory is the compiler's. FLOPs and bytes are counted in its program
with loops multiplied out, per device and step.

**The rule of the seconds.** An operation takes max(FLOPs / peak, bytes / bandwidth), a collective its bytes
over the links' bandwidth. Operations follow each other in the compiler's schedule, the order of its text. A
collective overlaps with exactly what the schedule has between its start and its end: a -start and its
-done, or the fusions over which a TPU spreads one collective. Such a window takes max(link time, the
operations in it); collectives that are on their way at once share the links one after the other. Where the
compiler left a collective synchronous it overlaps nothing. Loops: one run of the body by this rule, times
its trips; what a body starts ends in it. "Nothing overlapped" is the plain sum, the roofline overlaps
everything, and cycles are the compiler's own estimate of everything but collectives and kernels.

**MFU.** The model's own FLOPs over what the chips could do in that time. Of attention's scores a causal
model needs (T + 1) / 2 for each query and not T, and a causal kernel computes little more: `mfu` counts
that half and cannot exceed 100 %. `mfu_full` (in brackets) counts all T, as the scaling laws' FLOPs and
most papers do. Percentages: mHC over residual, same mesh, same recomputation.
"""
LIMITS = """
What limits. Hyper-connections add few FLOPs; they move streams through the memory, and their cost is that
of its traffic. Peak rates are never reached, and unequally: products come closer to theirs than small
vector operations do, whose time on the vector unit (it has no published peak) is not counted; the
compiler's cycles count it. Float32 products count three or six passes. A kernel of Pallas counts as its own
estimate of FLOPs and bytes says. The overheads are estimates, good for comparing two programs, not for
promising a speed.
"""
PEERS = """
## What others report

None of these is the same measurement; they are set beside the tables below, which are predictions.

| who | what | figures |
|---|---|---|
| the mHC paper (arXiv 2512.24880) | training at n = 4 in its own kernels | +6.7 % time |
| DeepGEMM's Mega-mHC (vllm-project/vllm#56962, #56633) | write, read, norm in one pass; forward only \
| GB300, width 5120, 1 to 128 tokens: 10.2 to 11.8 us a boundary; \
TileLang fused 8.4 to 14.0, unfused 13.1 to 14.0 |
| TransformerEngine (NVIDIA/TransformerEngine#2790, #2978) | forward and backward, four Triton kernels \
| projection 4096 x 4096 forward 38.8 us; 4096 x 2048 backward 60.8 us; Sinkhorn 13.5 us for 16,384 tokens |
| NeMo Automodel (NVIDIA-NeMo/Automodel#3855) | training in torch operations | none |
| Liger-Kernel 0.8.5 (linkedin/Liger-Kernel#1065) | forward and backward, several Triton kernels | none |
| MaxText 0.2.5 (AI-Hypercomputer/maxtext#4647, #4649) | Pallas, forward and backward, mHC-lite | none |
"""
TABLES_HEAD = {
  'kernels': 'Kernels: cycles of one core from the static schedule, and the time of their bytes',
  'connection': "One sublayer's connection, without a branch: bytes in C-units (a bfloat16 width per token)",
}
SMALL = """## A small step: width 64, depth 4, one chip of v5e

Cycles of the compiler for XLA's operations and of the static schedule for kernels; the largest
model of `mhc sweep quick`."""
POPULATION = """## Populations: several small runs in one program, one chip of v5e

Microseconds of a member and update (depth 4, batches of 8 x 128 tokens, float32) by the compiler's cycles,
for P members side by side (`mhc sweep --population P`), and members per second over one run after another.
What is not compiled yet (`mhc overhead --only population-v5e` goes on) is a dash or has no row. The host is
not in it. Measured on one core of a server's CPU, a run alone costs it 0.8 ms for each update with a
dispatch of its own (transfer of the batch 0.4, dispatch 0.2, batch 0.1, metrics 0.1), as on several
devices; with up to 64 updates and their tokens in a dispatch, as one device has them, 0.12 ms for a member
and update, nearly all of it the shuffled order of windows, which members of one seed share."""
