"""Engines: drivers/engines/, without what starts vLLM."""

from tests.mutants.table import breaks

ENGINES, RUN_FILES = "tests/drivers/test_engines.py", "tests/drivers/test_run_files.py"
SUPERVISION, MEMORY, OBJECTIVE, RESUME = (
    f"tests/drivers/test_{name}.py" for name in ("supervision", "memory", "objective", "resume")
)
HF = "drivers/engines/hf.py"
CONVERSATIONS = "tests/drivers/test_conversations.py -k 'not example'"

MUTANTS = [
    *breaks(
        "start_llm",
        "drivers/engines/vllm_startup.py",
        f"{ENGINES} -k head_size",
        ("heads of any size", "and size and size not in supported:", "and False:"),
        (
            "not checked on a CPU",
            '    if options.device.type == "cpu":\n        _check',
            "    if False:\n        _check",
        ),
    ),
    *breaks(
        "blame_engine",
        "drivers/engines/factory.py",
        "tests/drivers/test_one_line.py -k 'sample or failed_start'",
        (
            "a traceback",
            'raise UsageError(f"--engine {kind}: cannot sample',
            'raise RuntimeError(f"--engine {kind}: cannot sample',
        ),
    ),
    *breaks(
        "HFEngine.generate",
        HF,
        f"{ENGINES} {OBJECTIVE} {MEMORY} -k 'generate or top_p or self_check or hf_engine'",
        ("the seed is ignored", "torch.manual_seed(seed)", "torch.manual_seed(0)"),
        (
            "the temperature is ignored",
            "temperature=None if greedy else sampling.temperature,",
            "temperature=None if greedy else 1.0,",
        ),
        ("top-p is ignored", "top_p=1.0 if greedy else sampling.top_p,", "top_p=1.0,"),
        ("never greedy", "greedy = sampling.temperature == 0", "greedy = False"),
    ),
    *breaks(
        "Sampler",
        "drivers/engines/sampler.py",
        CONVERSATIONS,
        ("a turn has the room of a whole response", "room = len(self._prompt) + self", "room = len(context) + self"),
        ("the response's own stop strings are lost", "stop=(*self._sampling.stop, *stop)", "stop=(*stop,)"),
        ("each turn has the minimum length", "max(0, n_missing)", "max(0, self._sampling.min_tokens)"),
        ("a full response is sampled again", "if self._is_full:", "if False:"),
        ("the whole response's stop ends a turn", "for text in stop if", "for text in sampling.stop if"),
        ("any context", "self._samples.get(self._prompt + context, ())", "sum(self._samples.values(), [])"),
        ("log-probs of a whole sample", "log_probs=sample.log_probs[:length]", "log_probs=sample.log_probs"),
        ("sets of other tokens", "sample.kept.unpack()[:length]", "sample.kept.unpack()[-length:]"),
        ("a part has the sets of the whole", "excluded=sample.excluded[:length],", "excluded=sample.excluded,"),
        (
            "inserted tokens have no set",
            "return [*map(tuple, sets), *[()] * (length - len(sets))]",
            "return [*map(tuple, sets)]",
        ),
        ("hidden tokens are lost", "excluded=excluded if any(excluded) else ()", "excluded=()"),
        ("nothing is cut off", "tuple(token_ids[:longest])", "tuple(token_ids)"),
        ("a full response has ended", "is_truncated = ends_without_room or", "is_truncated = False or"),
        ("a truncated turn ends the response", 'or last.finish_reason == "length"\n', "\n"),
        ("all tokens count as sampled", "            sampled=flags,\n", ""),
    ),
    *breaks(
        "sample_responses",
        "drivers/engines/conversations.py",
        CONVERSATIONS,
        ("one response to each question", "for _ in range(sampling.n)]", "for _ in range(1)]"),
        ("turns share their seeds", "seed if turn == 0 else", "seed if turn >= 0 else"),
        ("all have the longest limit", "limits=limits)", "limits=())"),
        ("a function may wait forever", "timeout=rollout.deadline_s", "timeout=None"),
        ("any flags", "if not all(isinstance(flag, bool) for flag in sampled):", "if False:"),
        ("any token", "or not (flag or 0 <= token < vocab)", ""),
    ),
    *breaks(
        "conversations in engines",
        HF,
        CONVERSATIONS,
        ("limits are ignored", "self._truncate(p, ids[:limit], lp", "self._truncate(p, ids, lp"),
    ),
    *breaks(
        "describe_completions",
        "drivers/engines/protocol.py",
        CONVERSATIONS,
        (
            "inserted tokens have an entropy",
            "compress(completion.log_probs, completion.is_sampled)]",
            "completion.log_probs]",
        ),
        ("inserted tokens count", "return sum(self.sampled) if self.sampled else", "return"),
    ),
    *breaks(
        "HFEngine.generate",
        HF,
        "tests/drivers/test_loading.py -k hf_engine",
        ("the model's own generation config", "generation_config = type(own)()", "generation_config = own"),
        ("the own config is lost", "            self._policy.generation_config = own\n", "            pass\n"),
    ),
    *breaks(
        "HFEngine.generate",
        HF,
        f"tests/drivers/test_replay.py {ENGINES} -k 'replay'",
        ("top-k is ignored", "top_k=None if greedy else sampling.top_k,", "top_k=None if greedy else 0,"),
        ("min-p is ignored", "min_p=None if greedy else sampling.min_p or None,", "min_p=None,"),
        ("sets of other steps", "sets[:length]", "sets[-length:]"),
    ),
    *breaks(
        "KeptTokens",
        "drivers/engines/kept_tokens.py",
        "tests/drivers/test_replay.py",
        ("padding is a token", "width), -1, dtype", "width), 0, dtype"),
    ),
    *breaks(
        "exclude_end",
        "drivers/engines/protocol.py",
        f"tests/drivers/test_replay.py {ENGINES} -k 'replay or exclude_end'",
        ("beyond the end of a response", "min(sampling.min_tokens, length)", "sampling.min_tokens"),
        ("the first token only", "min(sampling.min_tokens, length)", "min(sampling.min_tokens, 1)"),
        ("without replay too", "if not sampling.replays or sampling.truncates:", "if sampling.truncates:"),
    ),
    *breaks(
        "HFReplica",
        HF,
        f"{RESUME} -k 'resume_after_stop'",
        ("weights are not taken", "            own[name].copy_(weight)\n", "            pass\n"),
    ),
    *breaks(
        "HFReplica",
        HF,
        "tests/drivers/test_weights.py -k hf_replica",
        (
            "names in memory",
            "PolicyWeights(self._policy, self._policy.dtype)",
            "PolicyWeights(self._policy, self._policy.dtype, as_files=False)",
        ),
    ),
    *breaks(
        "make_engine",
        "drivers/engines/factory.py",
        "tests/drivers/test_weights.py -k cannot_be_converted",
        ("no check before the start", "    weights.metadata()  # raises", "    # raises"),
    ),
    *breaks(
        "ReceivingModel",
        "drivers/engines/vllm_transfer.py",
        f"{ENGINES} -k 'receiving_model or nccl_engine'",
        (
            "errors are raised",
            "        except Exception as error:  # models",
            "        except ZeroDivisionError as error:  # models",
        ),
        (
            "errors are lost",
            "        if self._failure or not self._untouched:\n            return self._failure\n",
            "        if not self._untouched:\n            return ''\n",
        ),
        (
            "the rest does not arrive",
            "        for _ in arriving:  # what the model left, so that its sender ends too\n            pass\n",
            "",
        ),
        ("the last error", "self._failure = self._failure or reason", "self._failure = reason"),
        ("a tied head is missing", "(is_tied and isinstance(layer, ParallelLMHead))", "False"),
        ("no head is missing", "(is_tied and isinstance(layer, ParallelLMHead))", "isinstance(layer, ParallelLMHead)"),
        ("a half is a whole", "if name not in reached]", "if not info.loaded_weights]"),
        ("loaded layers are missing", "        if not info.can_load() or", "        if"),
    ),
    *breaks(
        "ServerEngine",
        "drivers/engines/vllm_server.py",
        "tests/drivers/test_server.py -k not_loaded",
        ("what was loaded is not asked", "        check_loaded(self._unloaded(), version)\n", ""),
    ),
    *breaks(
        "describe_completions",
        "drivers/engines/protocol.py",
        f"{RUN_FILES} -k describe_completions",
        (
            "a mean of the means of responses",
            '"rollout_entropy": -log_probs.mean().item()',
            '"rollout_entropy": -sum(sum(o.log_probs) / len(o.log_probs) for o in completions) / len(completions)',
        ),
        (
            "the mean log-prob",
            '"rollout_entropy": -log_probs.mean().item()',
            '"rollout_entropy": log_probs.mean().item()',
        ),
        (
            "the number of truncated responses",
            "for completion in completions) / len(completions)",
            "for completion in completions) / 1.0",
        ),
        (
            "the shortest response",
            '"response_tokens_max": lengths.max().item()',
            '"response_tokens_max": lengths.min().item()',
        ),
    ),
    *breaks(
        "engine_memory_fraction",
        "drivers/engines/placement.py",
        f"{MEMORY} -k 'shares_gpu or shared_gpu or memory_fraction'",
        (
            "all that is left",
            "share = 0.9 - reserved_bytes / total_bytes",
            "share = 1.0 - reserved_bytes / total_bytes",
        ),
        ("nothing is reserved", "share = 0.9 - reserved_bytes / total_bytes", "share = 0.9"),
        ("shared by several ranks", "distributed.size() == 1 and config.engine", "config.engine"),
        ("servers share the GPU", " and not config.rollout_url\n", "\n"),
    ),
    *breaks(
        "SupervisedEngine",
        "drivers/engines/supervision.py",
        f"{SUPERVISION} -k 'supervised or async_engine or call_with_timeout or is_running'",
        (
            "restarted without weights",
            "        if self._version is not None:\n            self._engine.load_weights(self._version)\n",
            "",
        ),
        (
            "the version of the first push",
            "        self._version = version\n        try:",
            "        self._version = self._version or version\n        try:",
        ),
        (
            "restarted in the background",
            "            if threading.current_thread() is not threading.main_thread():\n                raise\n",
            "",
        ),
        (
            "the dead engine is not closed",
            "            self._engine.close()\n        try:",
            "            pass\n        try:",
        ),
    ),
    *breaks(
        "check_weight_version",
        "drivers/engines/protocol.py",
        "tests/drivers/test_server.py -k other_weight_version",
        (
            "any version",
            "- {version}:\n        raise EngineDiedError",
            "- {version} - {completions[0].weight_version}:\n        raise EngineDiedError",
        ),
    ),
    *breaks(
        "GPU engines",
        "drivers/engines/vllm_startup.py",
        "tests/drivers/test_engines.py -k 'sleeps_only or placement_uses or float32_logits'",
        ("logits of bfloat16", '{"head_dtype": "float32"}', '{"head_dtype": "model"}'),
        (
            "float32 logits on a CPU too",
            'if options.device.type == "cuda" else {}),',
            "if True else {}),",
        ),
        ("an evaluation sleeps", "placement.shares_gpu and options.may_sleep", "placement.shares_gpu"),
        ("an engine alone sleeps", "placement.shares_gpu and options.may_sleep", "options.may_sleep"),
        (
            "graphs stay on the GPU",
            '"sleep_mode_offload_cudagraph": sleeps,',
            '"sleep_mode_offload_cudagraph": False,',
        ),
    ),
    *breaks(
        "format_command",
        "drivers/engines/vllm_server.py",
        "tests/drivers/test_server.py -k format_command",
        ("servers round logits", 'if on_gpu else ("host", "")', 'if False else ("host", "")'),
    ),
    *breaks(
        "nccl_init",
        "drivers/engines/vllm_transfer.py",
        "tests/drivers/test_engines.py -k nccl_transfer",
        ("small buffers", "max(MIN_BUFFER_BYTES, largest)", "MIN_BUFFER_BYTES"),
        ("buffers of values", "math.prod(weight.shape) * weight.dtype.itemsize", "math.prod(weight.shape)"),
    ),
    *breaks(
        "VLLMEngine",
        "drivers/engines/vllm.py",
        "tests/drivers/test_engines.py -k handshake",
        ("the handshake waits for the deadline", "min(self._deadline_s, limit_s)", "self._deadline_s"),
    ),
    *breaks(
        "engine_memory_fraction",
        "drivers/engines/placement.py",
        f"{MEMORY} -k memory_fraction",
        ("a second GPU always helps", "if reserved_bytes < 0.9 * total_bytes else", "if True else"),
    ),
]
