"""What work costs: devices, sizes of models and data, measured speeds, and the arithmetic between them."""
