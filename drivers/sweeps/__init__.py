"""Many runs: presets, plans, execution, results."""
