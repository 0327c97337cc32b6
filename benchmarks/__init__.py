"""Speed and memory of tiltjax, alone and side by side with its peers; nothing here is a timed test."""
