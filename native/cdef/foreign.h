/* What Python may call of foreign.h. */

struct au_foreign_heard {
	uint64_t patience;
	struct au_uffd_msg *messages;
	int64_t room, count;
};

int64_t au_foreign_fill(int fd, int op, uint64_t start, const uint8_t *src, uint64_t length,
			uint64_t page_size, uint8_t *states, uint64_t *absent,
			struct au_foreign_heard *heard);
int64_t au_foreign_read(int fd, struct au_uffd_msg *messages, int64_t max);
int au_foreign_alive(int fd);

struct au_foreign_area {
	uint64_t start, length;
	uint64_t page_size;
	const uint8_t *bytes;
	uint8_t *states;
};

int64_t au_foreign_pump(int fd, const struct au_foreign_area *areas, uint64_t count,
			uint64_t window, struct au_uffd_msg *out, int64_t max, uint64_t *faults,
			uint64_t *installed);
