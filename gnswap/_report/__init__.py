"""The fidelity report: what a conversion kept of a network, measured lever by lever, as data and as pictures."""
