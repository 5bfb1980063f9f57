"""The page on which a user starts a job, and the API that computes."""

from django.contrib.auth.mixins import LoginRequiredMixin
from django.urls import reverse_lazy
from django.views.generic import CreateView
from keyproxy_client.django.drf import HasAPIKey, KeyproxyAuthentication
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from jobs.models import Job
from jobs.tasks import run_job


class StartJob(LoginRequiredMixin, CreateView):
    """Save a job and start it in the background."""

    model = Job
    fields = ["prompt", "is_test"]
    template_name = "jobs/start.html"
    success_url = reverse_lazy("start")

    def form_valid(self, form):
        form.instance.user = self.request.user
        response = super().form_valid(form)
        job = form.instance
        run_job.apply_async_on_commit((job.pk,), headers={"keyproxy_test": job.is_test})
        return response


class ComputeJobs(APIView):
    """The API. In production it would be a server of its own, with GPUs."""

    authentication_classes = [KeyproxyAuthentication]
    permission_classes = [HasAPIKey]

    def post(self, request: Request) -> Response:
        answer = str(request.data["prompt"]).upper()
        return Response({"user": request.user.get_username(), "is_test": request.auth.is_test, "answer": answer})
