"""Weights from wherever they are to wherever they are wanted, one tensor at a time.

``find`` recognises an input by its content and opens it as a ``Source``: a model folder
(``model_folders``), a run or a checkpoint of ours (``checkpoints``), DeepSpeed's own (``zero`` over
``zero_layouts`` and ``zero_partitions``), or an AstroPT file (``astropt`` over ``generations``).
Pickles are read by ``torch_file`` and ``unpickle``, and written by ``torch_write``. ``write`` makes
model folders and AstroPT files of any source, ``load`` a model in memory, also from the ``hub``.
"""
