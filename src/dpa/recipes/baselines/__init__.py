"""What directional preference alignment is compared with: one small file per method, over one Lab."""
