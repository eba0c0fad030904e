"""Source videos from web sites."""
