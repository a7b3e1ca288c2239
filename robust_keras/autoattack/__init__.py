"""AutoAttack (Croce & Hein 2020, https://arxiv.org/abs/2003.01690), with the reference implementation's parameters."""
