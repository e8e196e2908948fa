#!/bin/sh
echo '@SH@' | sed '1i #!/bin/sh' >.git/hooks/pre-commit
chmod +x .git/hooks/pre-commit
