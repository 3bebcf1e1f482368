"""The lab: the experiments, from the LeNet tutorial on."""
