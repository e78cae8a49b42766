"""A model for elsewhere: as ONNX, as torch.export's .pt2, or as a folder for the Hugging Face hub.

    face        export(): one way in for all three
    answers     what the original answers to batches of 1 and 3, and how far what was written is from that
    capture     the model's graph by torch.export, for every batch size
    onnx, pt2   write a file, read it back, run it
    hub, card   write a folder of checkpoint, config.json and model card, read it back, upload it
    timing      how long a call takes

Why it is not named after `isomorphic.export`: importing a submodule of that name would put it in the function's place.
"""
