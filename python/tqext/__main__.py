from tqext.cli import main

main()
