"""How good codes are found: calibration text, Hessians, the solver, the streamed run."""
