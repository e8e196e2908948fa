#!/bin/sh
mkdir -p .git/hooks
echo '@SH@' | sed '1i #!/bin/sh' >.git/hooks/post-checkout
chmod +x .git/hooks/post-checkout
git commit -q --allow-empty -m made
