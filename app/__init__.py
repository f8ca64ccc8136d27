"""The Gradio app: speed and quality as they happen. ``arsd app`` serves it; see docs/app.md."""
