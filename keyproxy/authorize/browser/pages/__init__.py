"""The pages for people: plain HTML without scripts, in three languages."""
