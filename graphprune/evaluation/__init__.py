"""How good a program is: perplexity, ablation, sweeps over sizes."""
