"""A reader and an evaluator of saved Core ML ML Programs, with nothing of the converter that wrote them."""
