"""The fused head."""

from tests.mutants.table import breaks

HEAD = "tests/property/test_fused_head.py -k 'not loss'"
LOSS = "tests/property/test_fused_head.py -k 'loss or products or float16 or backward or gradient'"
SETS = "tests/property/test_token_sets.py"
SETS_IN_HEAD = f"{SETS} -k fused"

MUTANTS = [
    *breaks(
        "select_log_probs",
        "scoring/_token_sets.py",
        f"{SETS} tests/unit/test_errors.py",
        (
            "padding keeps token 0",
            "logits.gather(1, ids).masked_fill_(self.kept < 0, -math.inf)",
            "logits.gather(1, ids)",
        ),
        ("padding excludes token 0", "bounds.masked_fill_(self.excluded < 0, math.inf)", "pass"),
        ("everything is kept", 'logits.fill_(-math.inf).scatter_reduce_(1, ids, values, "amax")', "pass"),
        ("nothing is excluded", "if self.excluded is not None:\n            bounds", "if False:\n            bounds"),
        ("labels outside of their sets", "if outside.any():", "if False:"),
        ("only kept ids hold labels", "outside |= (self.excluded == labels[:, None]).any(dim=1)", "pass"),
        ("any ids", "low >= PADDING and high < vocab", "True"),
        ("padding of a traced set", "torch.where(ids < 0, vocab, ids.long())", "ids.clamp(min=0).long()"),
        ("a traced set keeps what is excluded", "masks[0] & ~masks[1]", "masks[0]"),
    ),
    *breaks(
        "select_log_probs",
        "scoring/distributions.py",
        SETS,
        ("the caller's logits", "logits.clone(memory_format=torch.contiguous_format)", "logits.contiguous()"),
        ("traced without sets", "torch.where(sets.contains(z.shape[-1]), z, -math.inf)", "z"),
    ),
    *breaks(
        "compute_entropy",
        "scoring/distributions.py",
        SETS,
        (
            "an entropy without sets",
            "None, temperature, with_entropy=True, sets=sets)",
            "None, temperature, with_entropy=True)",
        ),
    ),
    *breaks(
        "fused_linear_log_probs",
        "scoring/fused_head.py",
        SETS_IN_HEAD,
        (
            "the sets of the first block",
            "logits = head.compute_logits(hidden[rows], sets.select(rows))",
            "logits = head.compute_logits(hidden[rows], sets.select(slice(0, rows.stop - rows.start)))",
        ),
        ("a block computed again without sets", "ctx.sets.select(rows)", "TokenSets()"),
        (
            "sets of masked tokens",
            "flatten().select(tokens)\n    check_labels(targets, len(lm_head_weight))\n"
            "    sets.check(targets, len(lm_head_weight))\n    log_probs",
            "flatten()\n    log_probs",
        ),
    ),
    *breaks(
        "fused_linear_log_probs",
        "scoring/_softmax_stats.py",
        SETS_IN_HEAD,
        ("a cap makes tokens possible", "out.masked_fill_(logits == -math.inf, -math.inf)", "out"),
    ),
    *breaks(
        "fused_linear_token_loss",
        "scoring/fused_head.py",
        SETS_IN_HEAD,
        (
            "a loss without sets",
            "exp = head.compute_logits(hidden[rows], sets.select(rows))\n                stats",
            "exp = head.compute_logits(hidden[rows], TokenSets())\n                stats",
        ),
    ),
    *breaks(
        "fused_linear_log_probs",
        "scoring/_softmax_stats.py",
        HEAD,
        ("logits kept, not weights", "            logits[rows] = exp\n", "            pass\n"),
        ("weights without their sum", "exp.mul_(-label_grad / exp_sum)", "exp.mul_(-label_grad)"),
        (
            "a block computed again without its maximum",
            "out=shifted), stats.max_logit[rows], out=shifted)",
            "out=shifted), 0.0, out=shifted)",
        ),
        (
            "a block computed again without its cap",
            "torch.sub(_scale_logits(logits[rows], scaling, out=shifted), stats",
            "torch.sub(_scale_logits(logits[rows], Scaling(), out=shifted), stats",
        ),
        (
            "probabilities without their sum",
            "        p.div_(tile_stats.exp_sum)\n",
            "",
        ),
        ("entropy of weights, not probabilities", "weighted_sum.div_(exp_sum)", "weighted_sum"),
        ("slope without 1/T", "tile_stats.exp_sum, tile_grad)", "tile_stats.exp_sum, grad.select(rows))"),
        (
            "slope beside an entropy without 1/T",
            "scaled_grad = grad.divide(scaling.temperature)",
            "scaled_grad = grad._replace(entropy=grad.divide(scaling.temperature).entropy)",
        ),
        (
            "entropy slope without 1/T",
            "scaled_grad = grad.divide(scaling.temperature)",
            "scaled_grad = grad.divide(scaling.temperature)._replace(entropy=grad.entropy)",
        ),
        ("entropy slope without H", ".add_(stats.entropy)", ""),
        ("entropy slope turned around", ".mul_(-grad.entropy).sub_", ".mul_(grad.entropy).sub_"),
        ("the cap has no slope", "result if cap_slope is None else result.mul_(cap_slope)", "result"),
        (
            "slope of the cap at another temperature",
            "mul_(scaling.temperature / scaling.softcap)",
            "mul_(1 / scaling.softcap)",
        ),
        (
            "slope of the cap from a shifted logit",
            "log_p + tile_stats.log_normalizer",
            "log_p + tile_stats.exp_sum.log()",
        ),
        (
            "an unlikely label's logit lost",
            "log_p.scatter_(1, tile_labels[:, None], tile_stats.log_probs)",
            "pass",
        ),
        ("temperature inside the cap", "out.div_(scaling.softcap).tanh_()", "out.div_(scaling.temperature).tanh_()"),
        ("narrow arithmetic", "torch.promote_types(logits.dtype, torch.float32)", "logits.dtype"),
        ("blocks that overlap", "min(start + size, total)", "min(start + size + 1, total)"),
        ("no gradient for the label", "/ exp_sum).scatter_add_(1, labels[:, None], label_grad)", "/ exp_sum)"),
    ),
    *breaks(
        "fused_linear_log_probs",
        "scoring/_linear_head.py",
        HEAD,
        ("the bias forgotten", "product if self.bias is None else product.add_(self.bias)", "product"),
        ("only the last block", "self._of_weight is None else _widen", "True else _widen"),
        ("sums that stay narrow", "return part.to(get_wide_dtype(part))", "return part"),
        ("always made again", "return tokens <= self._max_rows()", "return False"),
        ("always kept", "return tokens <= self._max_rows()", "return True"),
        ("more than is free", "memory_reserved(device) - torch", "memory_reserved(device) + torch"),
        ("blocks that differ from run to run", "or torch.are_deterministic_algorithms_enabled()", "or False"),
        ("small blocks on CUDA", "_BLOCK_ROWS_ON_CUDA if self.weight.is_cuda", "_BLOCK_ROWS if self.weight.is_cuda"),
    ),
    *breaks(
        "fused_linear_log_probs",
        "scoring/fused_head.py",
        HEAD,
        ("kept logits used twice", "kept_exp, ctx.kept_exp = ctx.kept_exp, None", "kept_exp = ctx.kept_exp"),
        (
            "masked rows computed",
            "tokens = None if response_mask is None else _find_tokens(response_mask)",
            "tokens = None",
        ),
        (
            "labels not checked",
            "check_labels(targets, len(lm_head_weight))\n    sets.check(targets, len(lm_head_weight))\n    log_probs",
            "\n    log_probs",
        ),
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
        ("values of other tokens", "place = tokens[block]", "place = tokens[: block.stop - block.start]"),
        ("columns of a batch of one row", "column = place // labels.shape[1], place", "column = place * 0, place"),
        ("a scale after it ignored", "scale_gradient(part, grad_loss) for part", "part for part"),
        (
            "gradients that outlive backward",
            "ctx.save_for_backward(*gradients.result())",
            "ctx.gradients = gradients.result()\n        ctx.save_for_backward(*ctx.gradients)",
        ),
        ("only the last share", "loss += share", "loss = share"),
        (
            "slopes exchanged",
            "grad = StatsGrad(*torch.autograd.grad(share, leaves, allow_unused=True))",
            "grad = StatsGrad(*torch.autograd.grad(share, leaves, allow_unused=True)[::-1])",
        ),
        (
            "entropy has no slope",
            "return share.detach(), grad",
            "return share.detach(), grad._replace(entropy=None)",
        ),
        ("what is told has a slope", "ctx.mark_non_differentiable(log_probs, entropy)", "pass"),
        ("a loss without a slope fails", "if not share.requires_grad:", "if False:"),
    ),
    *breaks(
        "fused_linear_token_loss",
        "scoring/_linear_head.py",
        LOSS,
        ("small slopes lost in float16", "if self._normalizes:", "if False:"),
        ("no scale of no slopes", "stats.max_logit.new_full((1, 1), 1e-30), *columns", "*columns"),
        ("the scale of small slopes stays", "return part if scale is None else", "return part if True else"),
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
            'values["log_probs"], old, cliprange, response_mask',
            "old, old, cliprange, response_mask",
        ),
    ),
]
