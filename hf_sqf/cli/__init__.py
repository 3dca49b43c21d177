"""What the commands of ``hf-sqf`` do. What can be typed is declared in ``hf_sqf_command``, outside the package."""
