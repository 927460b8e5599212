/* What Python may call of children.h and inherit.h. */

#define AU_INHERITED_ALL_FAULTS ...
#define AU_INHERITED_USER_MODE ...

struct au_child {
	int uffd;
	int socket;
	int32_t pid;
	uint32_t regions;
};

struct au_child_region {
	uint64_t serial;
	uint64_t start;
	uint64_t length;
	uint64_t page_size;
};

int au_children_fd(void);
int au_children_receive(struct au_child *child);
void au_children_release(int uffd, int socket);
