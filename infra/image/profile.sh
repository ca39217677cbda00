# What the image's ENV says, said again to login shells.
export PATH=/opt/facemae/bin:$PATH
