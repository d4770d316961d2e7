"""The fused head."""

from tests.mutants.table import breaks

HEAD = "tests/property/test_fused_head.py -k 'not loss'"
LOSS = "tests/property/test_fused_head.py -k 'loss or products or float16 or backward or pull'"

MUTANTS = [
    *breaks(
        "fused_linear_log_probs",
        "scoring/_softmax_stats.py",
        HEAD,
        ("logits kept, not weights", "            logits[tile] = weights\n", "            pass\n"),
        ("weights without their sum", "p.mul_(-pull / told.total[tile])", "p.mul_(-pull)"),
        (
            "probabilities without their sum",
            "torch.log(p.div_(told.total[tile]), out=log_p)",
            "torch.log(p, out=log_p)",
        ),
        ("0 times infinity in the slope", "out=log_p).clamp_(min=_NEVER)", "out=log_p)"),
        ("entropy of weights, not probabilities", "entropy.div_(total)", "entropy"),
        ("slope without 1/T", "pull[tile] / scaling.temperature", "pull[tile]"),
        ("slope beside an entropy without 1/T", "else by_log_prob[tile] / temperature", "else by_log_prob[tile]"),
        ("entropy slope without 1/T", "spread = by_entropy[tile] / temperature", "spread = by_entropy[tile]"),
        ("entropy slope without H", ".add_(told.entropy[tile]).mul_(-spread)", ".mul_(-spread)"),
        ("entropy slope turned around", ".mul_(-spread).sub_", ".mul_(spread).sub_"),
        ("the cap has no slope", "p if slope is None else p.mul_(slope)", "p"),
        (
            "slope of the cap at another temperature",
            "mul_(scaling.temperature / scaling.softcap)",
            "mul_(1 / scaling.softcap)",
        ),
        (
            "slope of the cap from a shifted logit",
            "log_p + (told.top[tile] + told.total[tile].log())",
            "log_p + told.total[tile].log()",
        ),
        (
            "an unlikely label's logit lost",
            "log_p.scatter_(1, labels[tile, None], told.log_probs[tile])",
            "pass",
        ),
        ("temperature inside the cap", "room.div_(scaling.softcap).tanh_()", "room.div_(scaling.temperature).tanh_()"),
        ("narrow arithmetic", "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),
        ("blocks that overlap", "min(start + size, total)", "min(start + size + 1, total)"),
        ("no pull on the label", ".scatter_add_(1, labels[tile, None], pull)\n\n\ndef _pull", "\n\n\ndef _pull"),
    ),
    *breaks(
        "fused_linear_log_probs",
        "scoring/_linear_head.py",
        HEAD,
        ("the bias forgotten", "product if self.bias is None else product.add_(self.bias)", "product"),
        ("only the last block", "self._of_weight is None else self._widened", "True else self._widened"),
        ("sums that stay narrow", "return part.to(wide_type(part))", "return part"),
        ("always made again", "return tokens <= self._rows_that_fit()", "return False"),
        ("always kept", "return tokens <= self._rows_that_fit()", "return True"),
    ),
    *breaks(
        "fused_linear_log_probs",
        "scoring/fused_head.py",
        HEAD,
        ("kept logits used twice", "kept, ctx.kept = ctx.kept, None", "kept = ctx.kept"),
        ("masked rows computed", "rows = _rows_of(response_mask)\n    chosen", "rows = None\n    chosen"),
        ("labels not checked", "check_labels(targets, len(lm_head_weight))\n    log_probs", "\n    log_probs"),
        (
            "another order of the values",
            "values.new_zeros(shape.numel()).index_copy",
            "values.new_ones(shape.numel()).index_copy",
        ),
        ("the same temperature for all", "Scaling(temperature, logit_softcap)", "Scaling(1.0, logit_softcap)"),
        ("no cap", "Scaling(temperature, logit_softcap)", "Scaling(temperature, None)"),
        ("autocast ignored", "if torch.is_autocast_enabled(hidden.device.type):", "if False:"),
        ("types may differ", "hidden.dtype == weight.dtype,", "True,"),
    ),
    *breaks(
        "fused_linear_token_loss",
        "scoring/fused_head.py",
        LOSS,
        ("values of other tokens", "place = rows[tokens]", "place = rows[: tokens.stop - tokens.start]"),
        ("columns of a batch of one row", "column = place // labels.shape[1], place", "column = place * 0, place"),
        ("a scale after it ignored", "scale(part, by_loss) for part", "part for part"),
        (
            "gradients that outlive backward",
            "ctx.save_for_backward(*sums.result())",
            "ctx.sums = sums.result()\n        ctx.save_for_backward(*ctx.sums)",
        ),
        ("only the last share", "loss += share", "loss = share"),
        (
            "slopes exchanged",
            "by_log_prob, by_entropy = torch.autograd.grad",
            "by_entropy, by_log_prob = torch.autograd.grad",
        ),
        (
            "entropy has no slope",
            "return share.detach(), (by_log_prob, by_entropy)",
            "return share.detach(), (by_log_prob, None)",
        ),
        ("what is told has a slope", "ctx.mark_non_differentiable(log_probs, entropy)", "pass"),
        ("a loss without a slope fails", "if not share.requires_grad:", "if False:"),
    ),
    *breaks(
        "fused_linear_token_loss",
        "scoring/_linear_head.py",
        LOSS,
        ("small slopes lost in float16", "if self._narrow:", "if False:"),
        ("no scale of no slopes", "told.top.new_full((1, 1), 1e-30), *slopes", "*slopes"),
        ("the scale of small slopes stays", "return part if largest is None else", "return part if True else"),
    ),
    *breaks(
        "fused_linear_grpo_loss",
        "losses/fused_grpo.py",
        LOSS,
        ("one bound", '{"cliprange_high": cliprange_high, "dual_clip"', '{"cliprange_high": None, "dual_clip"'),
        ("no dual clip", '"dual_clip": dual_clip}', '"dual_clip": None}'),
        ("the ratio to its own pass", "else take(old_log_probs)", "else log_probs"),
        ("weights of its own", "if weights is None else weights", "if True else weights"),
        ("tokens weigh the same", "sum_weighted_losses(losses, take(step_weights))", "losses.sum()"),
        (
            "flags of the sampler",
            'told["log_probs"], old, cliprange, response_mask',
            "old, old, cliprange, response_mask",
        ),
    ),
]
