/* A client that never has enough, for tests: ./stress SOCKET THREADS SEED OPERATIONS
 *
 * Attaches, reads, writes and discards pages with several threads, checks every byte, detaches, and
 * begins anew, until its standard input ends.  Then it says "ok" with what it did.  It knows what each
 * word of the object has to be: its number, counted from 1.  A wrong byte is told, and ends it.
 */
#include "aiouffd_client.h"

enum content { OBJECT, ZEROS, OURS };

struct worker {
	struct aiouffd *memory;
	uint8_t *model; /* enum content of each page */
	uint64_t pages, page_size, number, count, operations, random;
	uint64_t touched, discarded, wrong;
};

static uint64_t next_random(struct worker *w)
{
	w->random ^= w->random << 13;
	w->random ^= w->random >> 7;
	w->random ^= w->random << 17;
	return w->random;
}

static uint64_t expected(const struct worker *w, uint64_t page, uint64_t word)
{
	uint64_t number = page * w->page_size / 8 + word;

	switch (w->model[page]) {
	case ZEROS:
		return 0;
	case OURS:
		return ~number;
	default:
		return number < w->memory->length / 8 ? number + 1 : 0;
	}
}

static void check(struct worker *w, uint64_t page)
{
	const volatile uint64_t *words =
		(const volatile uint64_t *)(const void *)(w->memory->address + page * w->page_size);
	uint64_t word, found;

	w->touched++;
	for (word = 0; word < w->page_size / 8; word++) {
		found = words[word];
		if (found == expected(w, page, word))
			continue;
		fprintf(stderr, "page %llu word %llu: %llu, not %llu (%d)\n", (unsigned long long)page,
			(unsigned long long)word, (unsigned long long)found,
			(unsigned long long)expected(w, page, word), w->model[page]);
		w->wrong = 1;
		return;
	}
}

static void write_page(struct worker *w, uint64_t page)
{
	uint64_t *words = (uint64_t *)(void *)(w->memory->address + page * w->page_size), word;

	w->model[page] = OURS;
	for (word = 0; word < w->page_size / 8; word++)
		words[word] = expected(w, page, word);
}

static void discard(struct worker *w, uint64_t page, int plain)
{
	uint8_t *address = w->memory->address + page * w->page_size;

	w->discarded++;
	w->model[page] = ZEROS;
	/* Without help only what was there at some time; see docs/serve-protocol.md. */
	if (plain ? madvise(address, w->page_size, MADV_DONTNEED) :
		    aiouffd_discard(w->memory, address, w->page_size)) {
		fprintf(stderr, "discard: %s\n", aiouffd_error());
		w->wrong = 1;
	}
}

static void *work(void *argument)
{
	struct worker *w = (struct worker *)argument;
	uint64_t index, page;

	for (index = 0; index < w->operations && !w->wrong; index++) {
		/* Each page has one owner, who knows what is in it. */
		page = next_random(w) % (w->pages / w->count) * w->count + w->number;
		switch (next_random(w) % 8) {
		case 0:
			write_page(w, page);
			break;
		case 1:
			discard(w, page, 0);
			break;
		case 2:
			check(w, page);
			discard(w, page, 1);
			break;
		default:
			check(w, page);
		}
	}
	for (page = w->number; page < w->pages / w->count * w->count && !w->wrong; page += w->count)
		if (w->model[page] != OBJECT)
			check(w, page);
	return NULL;
}

int main(int count, char **arguments)
{
	enum { THREADS_MAX = 16 };
	struct worker workers[THREADS_MAX];
	pthread_t threads[THREADS_MAX];
	unsigned long long rounds = 0, touched = 0, discarded = 0, resumed = 0, wrong = 0;
	struct aiouffd_options options;
	struct pollfd input;
	struct aiouffd *memory;
	uint8_t *model;
	uint64_t pages, page_size = (uint64_t)sysconf(_SC_PAGESIZE);
	int index, total;

	if (count != 5 || (total = atoi(arguments[2])) < 1 || total > THREADS_MAX) {
		fprintf(stderr, "%s SOCKET THREADS SEED OPERATIONS\n", arguments[0]);
		return 2;
	}
	memset(&options, 0, sizeof options);
	memset(workers, 0, sizeof workers);
	options.flags = AIOUFFD_WRITABLE;
	options.timeout_ms = -1;
	input.fd = 0;
	input.events = POLLIN;
	for (index = 0; index < total; index++)
		workers[index].random = strtoull(arguments[3], NULL, 10) * 16 + (uint64_t)index + 1;
	do {
		memory = aiouffd_attach(arguments[1], &options);
		if (!memory) {
			fprintf(stderr, "attach: %s (errno %d)\n", aiouffd_error(), errno);
			return 2;
		}
		pages = (memory->length + page_size - 1) / page_size;
		model = (uint8_t *)calloc(1, pages);
		for (index = 0; index < total; index++) {
			struct worker *w = &workers[index];

			w->memory = memory;
			w->model = model;
			w->pages = pages;
			w->page_size = page_size;
			w->number = (uint64_t)index;
			w->count = (uint64_t)total;
			w->operations = strtoull(arguments[4], NULL, 10);
			if (!model || pages < w->count || pthread_create(&threads[index], NULL, work, w))
				return 2;
		}
		for (index = 0; index < total; index++) {
			pthread_join(threads[index], NULL);
			wrong += workers[index].wrong;
		}
		resumed += aiouffd_resumed(memory);
		rounds++;
		if (aiouffd_detach(memory))
			return 2;
		free(model);
		input.revents = 0;
	} while (!wrong && poll(&input, 1, 0) == 0);
	for (index = 0; index < total; index++) {
		touched += workers[index].touched;
		discarded += workers[index].discarded;
	}
	if (wrong)
		return 1;
	printf("ok rounds=%llu touched=%llu discarded=%llu resumed=%llu\n", rounds, touched, discarded,
	       resumed);
	return 0;
}
