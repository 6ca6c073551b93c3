"""The web page on which one plays with an attack: `advtune serve`. Only page.py and server.py need Gradio."""
