"""
Trains the bundled model from nothing on drawn clips: `python -m holitom_hf.bundled.training FOLDER`, or on every core
`torchrun --nproc-per-node 2 -m holitom_hf.bundled.training FOLDER`.

First the vision tower and the projector learn to tell, at every patch, what is there. Then they are frozen and the
decoder learns to answer; at its middle layer, heads that are thrown away afterwards ask every video token what the
thing under it has done so far. HoliTom takes no part: every video is seen whole. But it is seen in many layouts, with
1 to 32 frames, regular or not, as images, and with positions stretched or squeezed, as large models meet them.

With `--backbone qwen3_vl` the small Qwen3-VL is trained the same way, from what the bundled model has learned.
"""
