"""One file per stage; knows tables and engines, not how it is scheduled."""
