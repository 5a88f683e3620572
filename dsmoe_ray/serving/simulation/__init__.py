"""Routing traces through the scaling decisions of a serving application, without serving. Starts no process."""
