/* Memory that the program has mapped itself, as a VMM has it; for tests: ./vmm SOCKET
 *
 * Two areas that show the object's pages 0 to 31 and 32 to 47, and one that is zeros. Some pages are
 * touched, some dropped, some unmapped, some moved, some read by a child. Then it says "kill" and waits for the end of its
 * standard input, in which time the server is replaced, and looks whether all is as it was. At the
 * end the memory stays: what was there is there, the rest is an error.
 */
#include "aiouffd_client.h"

#include <setjmp.h>
#include <sys/wait.h>

enum { FIRST = 32, SECOND = 16, THIRD = 8 };

static size_t page;
static sigjmp_buf way_back;

static void fail(const char *what, unsigned long long number)
{
	fprintf(stderr, "%s %llu: %s\n", what, number, aiouffd_error());
	exit(1);
}

static uint8_t *map(size_t pages)
{
	void *memory = mmap(NULL, pages * page, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		fail("mmap", pages);
	return (uint8_t *)memory;
}

static uint64_t word(const uint8_t *memory, size_t number)
{
	return *(const volatile uint64_t *)(const volatile void *)(memory + number * page);
}

static void expect(const uint8_t *memory, size_t number, uint64_t value)
{
	uint64_t found = word(memory, number);

	if (found == value)
		return;
	fprintf(stderr, "page %zu: %llu, not %llu\n", number, (unsigned long long)found,
		(unsigned long long)value);
	exit(1);
}

/* The first word of a page of the object. */
static uint64_t object(size_t number)
{
	return number * page / 8 + 1;
}

static void on_bus_error(int number)
{
	(void)number;
	siglongjmp(way_back, 1);
}

/* Whether touching a page is a SIGBUS. */
static int is_error(const uint8_t *memory, size_t number)
{
	if (sigsetjmp(way_back, 1))
		return 1;
	word(memory, number);
	return 0;
}

int main(int count, char **arguments)
{
	struct aiouffd_area areas[3];
	uint8_t *memory[3], *moved;
	struct aiouffd_options options;
	struct aiouffd *client;
	size_t index;
	int status = 0;
	pid_t child = 0;
	char line;

	page = (size_t)sysconf(_SC_PAGESIZE);
	signal(SIGBUS, on_bus_error);
	memset(areas, 0, sizeof areas);
	memory[0] = map(FIRST);
	memory[1] = map(SECOND);
	memory[2] = map(THIRD);
	memory[0][5 * page] = 55; /* is there, and stays */
	for (index = 0; index < 3; index++)
		areas[index].address = memory[index];
	areas[0].length = FIRST * page;
	areas[1].length = SECOND * page;
	areas[1].offset = FIRST * page;
	areas[2].length = THIRD * page;
	areas[2].flags = AIOUFFD_ZEROS;
	memset(&options, 0, sizeof options);
	options.flags = AIOUFFD_FORK;
	client = aiouffd_hand_over(count == 2 ? arguments[1] : "", areas, 3, &options);
	if (!client && errno == EPERM) {
		options.flags = 0; /* then without a child */
		client = aiouffd_hand_over(arguments[1], areas, 3, &options);
	}
	if (!client)
		fail("hand_over", 0);
	expect(memory[0], 0, object(0));
	expect(memory[0], 5, 55);
	expect(memory[1], 3, object(FIRST + 3));
	expect(memory[2], 1, 0);
	memory[0][0] = 77;
	/* Dropped: one that was there, one that was not. */
	if (madvise(memory[1] + 3 * page, page, MADV_DONTNEED) ||
	    aiouffd_discard(client, memory[1] + 4 * page, page))
		fail("discard", 4);
	/* A hole, and something that was in the middle is elsewhere. */
	if (munmap(memory[0] + 8 * page, 4 * page))
		fail("munmap", 8);
	moved = (uint8_t *)mremap(memory[0] + 16 * page, 2 * page, 2 * page,
				  MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
	if (moved == MAP_FAILED)
		moved = (uint8_t *)mremap(memory[0] + 16 * page, 2 * page, 2 * page, MREMAP_MAYMOVE);
	if (moved == MAP_FAILED)
		fail("mremap", 16);
	expect(moved, 0, object(16));
	if (options.flags) {
		child = fork();
		if (!child) {
			aiouffd_forked(client);
			expect(memory[0], 0, (object(0) & ~UINT64_C(0xff)) | 77);
			expect(memory[0], 25, object(25));
			expect(memory[1], 3, 0);
			expect(memory[1], 4, 0);
			expect(moved, 1, object(17));
			_exit(0);
		}
		if (waitpid(child, &status, 0) != child || status)
			fail("the child ended with", (unsigned)status);
	}
	printf("kill\n");
	fflush(stdout);
	if (read(0, &line, 1) < 0)
		return 1;
	expect(memory[0], 0, (object(0) & ~UINT64_C(0xff)) | 77);
	expect(memory[0], 5, 55);
	expect(memory[0], 7, object(7));
	expect(memory[0], 12, object(12));
	expect(memory[0], FIRST - 1, object(FIRST - 1));
	expect(memory[1], 3, 0);
	expect(memory[1], 4, 0);
	expect(memory[1], 5, object(FIRST + 5));
	expect(memory[2], 1, 0);
	expect(memory[2], 2, 0);
	expect(moved, 0, object(16));
	/* The server may serve before the keeper has read its answer. */
	for (index = 0; index < 5000 && !aiouffd_resumed(client); index++)
		poll(NULL, 0, 1);
	if (aiouffd_resumed(client) != 1)
		fail("resumed", aiouffd_resumed(client));
	if (aiouffd_detach(client))
		fail("detach", 0);
	expect(memory[0], 7, object(7));
	expect(memory[1], 3, 0);
	expect(memory[1], 5, object(FIRST + 5));
	for (index = 20; index < FIRST - 1; index++)
		if (!is_error(memory[0], index))
			fail("no error for page", index);
	expect(moved, 0, object(16));
	if (!is_error(memory[1], 0) || !is_error(memory[2], 0) || !is_error(moved, 1))
		fail("no error for the page after detach", 0);
	printf("ok\n");
	return 0;
}
