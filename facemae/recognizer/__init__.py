"""Face recognisers: networks by name (backbone), their training (margin, augment, train), files of weights (pretrained, export, onnx).

Import from the modules: embedding by onnxruntime must not pay for loading torch.
"""
