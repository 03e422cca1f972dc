"""Methods: one paper, one file; network, objective and loop, readable beside the paper."""
