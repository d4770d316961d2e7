"""Files of a run: drivers/runs/."""

from tests.mutants.table import breaks

CHECKPOINT, RESUME, RUN_FILES, SAMPLES, FLAGS = (
    f"tests/drivers/test_{name}.py" for name in ("checkpoint", "resume", "run_files", "samples", "flags")
)
FOLDER, SAVED, LOG = (f"drivers/runs/{name}.py" for name in ("folder", "checkpoint", "log"))

MUTANTS = [
    *breaks(
        "prune_checkpoints",
        FOLDER,
        f"{CHECKPOINT} {RESUME} -k 'prune or newest_two'",
        (
            "the worst is the best",
            "best = max(evaluated, key=lambda pair: accuracies[pair[0]], default=(0, None))[1]",
            "best = min(evaluated, key=lambda pair: accuracies[pair[0]], default=(0, None))[1]",
        ),
        (
            "the newest is the best",
            "best = max(evaluated, key=lambda pair: accuracies[pair[0]], default=(0, None))[1]",
            "best = max(evaluated, key=lambda pair: pair[0], default=(0, None))[1]",
        ),
        (
            "one too many",
            "dated[:-keep] if keep is not None else ()",
            "dated[: -keep - 1] if keep is not None else ()",
        ),
        ("the best is deleted", "if path != best and path not in resumable[-1:]:", "if path not in resumable[-1:]:"),
    ),
    *breaks(
        "find_checkpoint",
        FOLDER,
        f"{CHECKPOINT} {RESUME} -k 'list_checkpoints or find_checkpoint or older_checkpoint'",
        (
            "the oldest first",
            "for _, checkpoint in reversed(list_checkpoints(path)):",
            "for _, checkpoint in list_checkpoints(path):",
        ),
        ("damage is not looked for", "reason = find_damage(checkpoint)\n", "reason = None\n"),
        (
            "in the order of names",
            "    return sorted(dated)\n",
            "    return sorted(dated, key=lambda pair: pair[1].name)\n",
        ),
        ("later ones stay", "if saved_step > step]", "if saved_step > step + 1]"),
    ),
    *breaks(
        "save_checkpoint",
        SAVED,
        f"{CHECKPOINT} {RESUME} -k 'checkpoint or damage or read_dtype or finished or copy_content or several_ranks'",
        (
            "an existing one is replaced",
            "    if folder.exists():\n        raise FileExistsError",
            "    if False:\n        raise FileExistsError",
        ),
        (
            "always float32 in the file",
            'model_config | {"dtype": content.dtype}',
            'model_config | {"dtype": "float32"}',
        ),
        (
            "the next step changes what is written",
            "torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())",
            "tensor.detach().cpu().contiguous()",
        ),
        ("one shard of several is enough", "    return all((_unfinished", "    return any((_unfinished"),
        ("shards begin at 0", 'json.dumps(places), "format": "pt"}', 'json.dumps({}), "format": "pt"}'),
        ("sizes are not compared", "        if size != n_bytes:\n", "        if False:\n"),
        ("sums are not compared", 'if entry["sha256"] != entries[name][1]:', "if False:"),
    ),
    *breaks(
        "RunLog",
        LOG,
        f"{RUN_FILES} {RESUME} {FLAGS} tests/drivers/test_loop.py -k 'run_log or jsonl or wandb or logged'",
        ("numbers that are not finite stay", "None if isinstance(v, float) and not math.isfinite(v) else v", "v"),
        (
            "no phase",
            '{"phase": phase, "step": step, **values})\n        named',
            '{"phase": "train", "step": step, **values})\n        named',
        ),
        ("the line of the checkpoint is dropped", 'if row["step"] <= step]', 'if row["step"] < step]'),
        ("later lines stay", 'for line, row in rows if row["step"] <= step]', "for line, row in rows]"),
    ),
    *breaks(
        "completions",
        "drivers/runs/completions.py",
        f"{SAMPLES} tests/drivers/test_loop.py -k 'round or token_texts or logged or log_has'",
        ("two decimals", "DIGITS = 4", "DIGITS = 2"),
        ("NaN stays", "round(value, DIGITS) if math.isfinite(value) else None", "round(value, DIGITS)"),
        ("tokens one by one", "context_start, text_end = text_end, end", "context_start, text_end = end, end"),
        (
            "the advantage is a list",
            'row["advantage"] = round_for_log(advantages)[0]',
            'row["advantage"] = round_for_log(advantages)',
        ),
    ),
    *breaks(
        "open_run_folder",
        "drivers/runs/resume.py",
        f"{CHECKPOINT} {RESUME} {FLAGS} -k 'all_damaged or finished or save_dir or recipe or lock'",
        ("damaged ones stay", "        rename_superseded(damaged)\n", ""),
        (
            "a finished run goes on",
            '["step"] >= config.n_grpo_steps else None',
            '["step"] > config.n_grpo_steps else None',
        ),
        ("every final model is finished", '["step"] >= config.n_grpo_steps else None', '["step"] >= 0 else None'),
        ("the folder has the model's name", "config.recipe or Path", "Path"),
    ),
    *breaks(
        "RunLog",
        LOG,
        f"{RUN_FILES} -k wandb_resumed",
        ("each process is a run of its own", "_read_wandb_id(folder) if after >= 0 else None", "None"),
        (
            "a run that starts over keeps its id",
            "_read_wandb_id(folder) if after >= 0 else None",
            "_read_wandb_id(folder)",
        ),
        ("wandb starts the run anew", 'resume="allow",', 'resume="never",'),
    ),
    *breaks(
        "StepSignals",
        "drivers/common/signals.py",
        "tests/drivers/test_interrupts.py -k 'step_signals or between_updates'",
        ("the second waits too", "            self._handler.raises_on_second = True", "            pass"),
        (
            "the signal is forgotten",
            "        if self.discard():\n            raise",
            "        if self.discard() and False:\n            raise",
        ),
        ("the handlers stay", "        self._held.close()\n", ""),
        ("the second interrupts a save", "with outer.second_signal(raises=False):", "with nullcontext():"),
        ("the second is lost in a save", "if outer.raises_on_second and len(outer.pending) > 1:", "if False:"),
        ("the first says nothing", "            self._on_first()", "            pass"),
    ),
    *breaks(
        "Run.hold_signals",
        "drivers/training/run.py",
        "tests/drivers/test_interrupts.py -k between_updates",
        ("nothing is held", "            self._signals.hold()", "            pass"),
        ("the end of the step does not stop", "        self._signals.release()", "        self._signals.discard()"),
    ),
    *breaks(
        "atomic_files",
        "drivers/common/atomic_files.py",
        f"{CHECKPOINT} -k on_the_disk",
        ("a text is named first", "        flush_to_disk(unfinished)\n", ""),
        ("a folder is named first", "        flush_to_disk(file)\n", "        pass\n"),
        ("its files are not flushed", '(*sorted(unfinished.rglob("*"), reverse=True), unfinished)', "(unfinished,)"),
        ("the name is not flushed", "    flush_to_disk(folder.parent)\n", ""),
    ),
    *breaks(
        "acquire_run_lock",
        "drivers/runs/lock.py",
        f"{RESUME} -k run_lock",
        ("a file in place of a lock", "fallback_to_soft=False", "fallback_to_soft=True"),
    ),
    *breaks(
        "RunLog",
        LOG,
        f"{RUN_FILES} -k 'service or tensorboard'",
        ("the last step is purged", "purge_step=after + 1", "purge_step=after"),
        ("repeated steps are kept", "purge_step=after + 1", "purge_step=None"),
        ("wandb ends the run", 'self._attempt("wandb", self._wandb.finish)', "self._wandb.finish()"),
    ),
    *breaks(
        "distributed.start",
        "drivers/common/distributed.py",
        "tests/drivers/test_ranks.py -k wait_for_each_other",
        ("a wait has another limit", "timeout=timedelta(seconds=timeout_s)", "timeout=timedelta(days=1)"),
    ),
]
