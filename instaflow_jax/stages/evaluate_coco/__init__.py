"""The stage `evaluate_coco`."""
