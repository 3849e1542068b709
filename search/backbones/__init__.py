"""What turns pictures into features: any timm model by its name, and the small ones of the generated scenes."""
