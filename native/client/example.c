/* The sum of an object's bytes, of which the server sends what is touched: ./example SOCKET */
#include "aiouffd_client.h"

int main(int count, char **arguments)
{
	struct aiouffd *memory = count == 2 ? aiouffd_attach(arguments[1], NULL) : NULL;
	unsigned long long sum = 0;

	if (!memory) {
		fprintf(stderr, "%s SOCKET: %s\n", arguments[0], aiouffd_error());
		return 1;
	}
	for (uint64_t at = 0; at < memory->length; at++)
		sum += memory->address[at];
	printf("%llu\n", sum);
	return aiouffd_detach(memory);
}
