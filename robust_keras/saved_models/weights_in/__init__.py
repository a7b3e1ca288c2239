"""Weights that others trained, out of files of PyTorch, Haiku and safetensors, without any of these.

    checkpoint -> torch_files, haiku_files, safetensors_files -> tensors      what a file holds
    families -> networks                                                      which network that is, and its weights
    published -> download                                                     the authors' own, by name

What reads a file builds arrays, names and containers of them, and nothing else; nothing that a file names is run.
"""
