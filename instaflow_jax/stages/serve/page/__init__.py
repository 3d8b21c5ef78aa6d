"""The page of `serve`, in gradio; it loads nothing from other servers and sends nothing to them."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
