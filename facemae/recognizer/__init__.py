"""Face recognisers: pretrained ones in ONNX files (onnx), and small ones trained here (compact, margin, train, export).

Import from the modules: embedding by onnxruntime must not pay for loading torch.
"""
