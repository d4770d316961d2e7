"""The model that learns: drivers/policy/."""

from tests.mutants.table import breaks

OPTIM, WEIGHTS, MEMORY, FLAGS, SUPERVISION, OVERLAP = (
    f"tests/drivers/test_{name}.py" for name in ("optim", "weights", "memory", "flags", "supervision", "overlap")
)
OPTIMIZER, PUSHED, LORA = (f"drivers/policy/{name}.py" for name in ("optimizer", "weights", "lora"))

MUTANTS = [
    *breaks(
        "PolicyOptimizer",
        OPTIMIZER,
        f"{OPTIM} {MEMORY} -k 'optimizer or training_state'",
        ("fixed betas", "betas=settings.adam_betas", "betas=(0.9, 0.95)"),
        ("no weight decay", "weight_decay=settings.weight_decay", "weight_decay=0.0"),
        ("a fixed epsilon", "eps=settings.adam_epsilon", "eps=1e-8"),
        ("a fixed rate", 'group["lr"] = learning_rate', 'group["lr"] = 1e-2'),
        (
            "gradients are kept after the step",
            "        self._copy_to_policy()\n        self.zero_grad()\n\n    @torch.no_grad()",
            "        self._copy_to_policy()\n\n    @torch.no_grad()",
        ),
    ),
    *breaks(
        "PolicyOptimizer.tensors",
        OPTIMIZER,
        "tests/drivers/test_resume.py -k goes_on_alike",
        (
            "moments are not saved",
            'tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}',
            'tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg",)}',
        ),
        (
            "moments are not restored",
            'tensors |= {f"{key}.{name}": moments[key] for',
            'tensors |= {f"{key}.{name}": moments[key].clone() for',
        ),
        (
            "the count of updates is not restored",
            '            self._adamw.state[master]["step"].fill_(n_updates)\n',
            "            pass\n",
        ),
        (
            "weights are not restored",
            'tensors[f"weight.{name}"] = master.detach()',
            'tensors[f"weight.{name}"] = master.detach().clone()',
        ),
    ),
    *breaks(
        "PolicyWeights",
        PUSHED,
        f"{WEIGHTS} -k 'checksum or check_arrived or policy_weights or lora_starts or stochastic or bfloat16_push'",
        (
            "LoRA is left out",
            "update = None if entry.lora_layer is None else _lora_update(entry.lora_layer)",
            "update = None",
        ),
        ("LoRA without its scale", "product = layer.scaling[name] * (up @ down)", "product = up @ down"),
        ("LoRA twice", "merged = weight.float() + update", "merged = weight.float() + 2 * update"),
        (
            "rounded to nearest",
            "return stochastic_round(merged, entry.name) if entry.dtype == torch.bfloat16 else merged.to(entry.dtype)",
            "return merged.to(entry.dtype)",
        ),
    ),
    *breaks(
        "PolicyWeights",
        PUSHED,
        f"{WEIGHTS} -k 'saver_writes or names_of_the_files or hf_replica or check_loaded'",
        ("names in memory", "return group_weights(self._policy, shapes)", "pass"),
        ("not converted", "(to_files(self._policy, weights) if is_converted else weights)", "weights"),
        (
            "no buffers",
            "        if self._as_files:\n            for name, buffer",
            "        if False:\n            for name, buffer",
        ),
        ("rounded buffers", "torch.float32 if buffer.is_floating_point() else buffer.dtype", "self._dtype"),
        ("files for all", "self._as_files = policy, dtype, as_files", "self._as_files = policy, dtype, True"),
        ("all is loaded", "        if problem:\n", "        if False:\n"),
    ),
    *breaks(
        "group_weights",
        "drivers/policy/file_names.py",
        f"{WEIGHTS} -k 'groups_are_small or cannot_be_converted'",
        ("one group", "name if id(weight) in unchanged else _layer_of(name)", "''"),
        ("each alone", "name if id(weight) in unchanged else _layer_of(name)", "name"),
        ("the layer of all", "if part.isdigit()), -1)", "if False), -1)"),
        ("any result", "    if found != {", "    if False and found != {"),
    ),
    *breaks(
        "add_lora",
        LORA,
        f"{WEIGHTS} {FLAGS} -k lora",
        ("the rank is ignored", "        r=rank,\n", "        r=8,\n"),
        ("the scale is ignored", "        lora_alpha=alpha,\n", "        lora_alpha=32,\n"),
        ("the seed is ignored", "        torch.manual_seed(seed)\n", "        torch.manual_seed(0)\n"),
        ("global noise", "        torch.manual_seed(seed)\n", ""),
        ("experts too", "target_modules=kinds,", 'target_modules="all-linear",'),
        ("the output too", " if policy.get_submodule(name) is not output}", "}"),
        ("experts are not refused", "not isinstance(module.get_base_layer(), (nn.Linear, Conv1D))", "False"),
    ),
    *breaks(
        "choose_device",
        "drivers/policy/devices.py",
        f"{FLAGS} {SUPERVISION} {OVERLAP} {MEMORY} -k 'policy_device or choose_devices or one_gpu or shares_gpu'",
        ("any device", 'if device.type == "cuda" and (device.index or 0) >= count_gpus():', "if False:"),
        ("sampling ahead on one GPU", "    if config.async_steps and is_same_device and on_gpu:", "    if False:"),
    ),
    *breaks(
        "load_policy",
        "drivers/policy/loading.py",
        f"{FLAGS} -k 'attention or type_that or end_of_a_turn'",
        ("attention is always automatic", '    if attention == "auto":\n', "    if True:\n"),
        ("always float32", '{"dtype": dtype, "attn', '{"dtype": torch.float32, "attn'),
        ("the end of a turn is ignored", "    if for_chat:\n", "    if False:\n"),
    ),
    *breaks(
        "load_policy",
        "drivers/policy/loading.py",
        "tests/drivers/test_loading.py -k 'sdpa'",
        ("sdpa for every model", 'chosen = "eager" if is_short else None', 'chosen = "eager" if is_short else "sdpa"'),
        ("eager for every row", 'chosen = "eager" if is_short else None', 'chosen = "eager"'),
        ("the flag is not named", '        if attention in ("auto", "eager"):\n', "        if True:\n"),
    ),
    *breaks(
        "resolve_model",
        "drivers/policy/loading.py",
        "tests/drivers/test_one_line.py -k 'wrong_input and model'",
        ("a run is a model", '    if (Path(path) / "metrics.jsonl").exists():\n', "    if False:\n"),
        ("no name is this folder", "    if not path:\n", "    if False:\n"),
        (
            "damaged files are a traceback",
            "    except Exception as error:  # a damaged",
            "    except OSError as error:  # a damaged",
        ),
        ("no word of the folder", 'place = "" if Path(model_path).exists() else', 'place = "" if True else'),
    ),
    *breaks(
        "check_loaded_weights",
        "drivers/policy/loading.py",
        "tests/drivers/test_loading.py -k 'load_policy'",
        ("nothing is missing", "    if missing:\n", "    if False:\n"),
        ("no name of what is there instead", 'if unexpected else ""', 'if False else ""'),
        ("unexpected weights are not reported", "    if unexpected:\n", "    if False:\n"),
    ),
    *breaks(
        "repair_generation_config",
        "drivers/policy/loading.py",
        "tests/drivers/test_loading.py -k 'generation_config_is_repaired'",
        ("not repaired", "    if _is_valid(config):\n", "    if True:\n"),
        ("sampling is lost", "sampling if _is_valid(sampling) else", "sampling if False else"),
        ("special tokens are lost", "type(config)(**tokens)", "type(config)()"),
    ),
    *breaks(
        "check_token_ids",
        "drivers/policy/loading.py",
        "tests/drivers/test_loading.py -k 'check_token_ids'",
        ("one id too many", "if largest >= (", "if largest > ("),
        ("the smallest id", "(max(question.token_ids", "(min(question.token_ids"),
    ),
    *breaks(
        "devices",
        "drivers/policy/devices.py",
        "tests/drivers/test_devices.py",
        ("a GPU without a driver is used", "if count and not torch.cuda.is_available():", "if False:"),
        ("the CPU needs a driver too", "        return default()\n", "        return default()\n    default()\n"),
        ("emulation is native", "including_emulation=False", "including_emulation=True"),
    ),
    *breaks(
        "_gather_on_default_stream",
        "drivers/policy/fsdp.py",
        "tests/drivers/test_devices.py -k sharded_weight",
        ("gathered too early", "    default.wait_stream(caller)\n", ""),
        (
            "gathered on the sender's stream",
            "    with torch.cuda.stream(default):",
            "    with torch.cuda.stream(caller):",
        ),
        ("sent before it is there", "    default.synchronize()\n", ""),
        ("overwritten while it is sent", "    full.record_stream(caller)", "    pass"),
    ),
]
