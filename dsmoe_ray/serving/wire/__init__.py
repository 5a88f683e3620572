"""What travels between the processes of a serving application, and how. Must not know engines, gateways or Ray."""
